"""One mesh of devices: how it is built, what lies where on it, and how processes join it."""
