"""Key-value caches that live in host memory and come to the device one layer ahead of the operators."""
