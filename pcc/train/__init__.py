"""Training: byte-level backbones and circuit heads, from a configuration to a folder that compiles.

`pcc.train.cli.run(config)` is `pcc train CONFIG`. Needs torch; nothing else in pcc imports this.
"""
