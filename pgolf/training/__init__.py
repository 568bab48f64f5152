"""The stage ``train``: from a configuration to the averaged weights."""
