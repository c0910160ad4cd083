"""Ways into the compiler: text, builder, templates, checkpoints."""
