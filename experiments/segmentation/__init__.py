"""A small fully convolutional network trained pixel by pixel, with ignored pixels."""
