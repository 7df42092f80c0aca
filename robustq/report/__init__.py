"""Tables, figures and the one HTML file that a run can be read from."""
