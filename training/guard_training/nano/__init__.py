"""The making of nano, the small guard inside the package, on two CPU cores."""
