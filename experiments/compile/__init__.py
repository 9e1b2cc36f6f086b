"""Compiled programs of jaxsoft and other libraries, for devices that this machine does not have."""
