"""The stage ``data``, and everything that reads or makes tokens."""
