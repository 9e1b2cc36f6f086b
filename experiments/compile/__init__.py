"""What compilers make of jaxsoft and other libraries for devices that are not there."""
