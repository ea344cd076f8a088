"""`python -m cmjax`: the command line."""

from cmjax.main import command

if __name__ == '__main__':
  command()
