"""What a run will need, told before it starts: parameters, FLOPs, memory, seconds, traffic (docs/planning.md).

`cards`, `costs` and `losses` are arithmetic and import nothing; `measure` runs a model on a few samples and counts;
`here` measures this machine; `recipe` puts a plan together from a recipe, and `report` prints it.
"""
