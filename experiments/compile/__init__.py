"""What compilers make of this library and its peers for devices that are not there."""
