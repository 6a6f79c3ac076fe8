"""The `outrider` command: one module per group of commands, loaded only when it is used."""
