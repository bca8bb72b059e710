"""What produces the numbers of the README. A package of its own right: pyarrow 17 installs another of that name."""
