"""`metamorph plan`: whether a step fits on chips that aren't here, and how fast it can be.

`chips` describes the hardware, `programs` builds the step, `hlo` reads what the compiler made of
it, `report` puts the numbers together, and `command` is the command line.
"""
