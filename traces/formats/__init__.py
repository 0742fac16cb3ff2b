"""One module a trace format: what marks a file as such, and the requests that it says."""
