"""`metamorph plan`: compiles a step for chips that aren't here, and says how it fits and how fast
it can be. `chips` what the chips can do, `programs` the step, `hlo` what the compiler made of it,
`flops` the model's own arithmetic, `report` all of it as a table, `command` the command line."""
