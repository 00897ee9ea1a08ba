"""What we are compared with; one file a peer."""
