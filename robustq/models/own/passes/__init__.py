"""Graph passes on a traced network, one a file: each changes the graph in place and keeps every answer."""
