"""The stage ``report``: the table of results and the page."""
