"""`python -m chaos.sim`: see `chaos.sim.command`."""

from chaos.sim.command import simulate

if __name__ == "__main__":
    simulate()
