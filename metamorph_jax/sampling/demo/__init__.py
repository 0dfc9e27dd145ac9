"""A page in the browser on which people talk with one or two models (`metamorph demo`)."""
