"""`suasion launch RECIPE --on aws`: the experiment on a rented machine that ends by itself.

offers.py     which machines may be had, where, at what price
resources.py  what is made in the account, and how all of it goes away again
quote.py      which of them a recipe may take, and the quote that the user agrees to
session.py    what the caller remembers of a launch; bound to one AWS account
machine.py    what the rented machine is told: its end, its service, its packages
ssh.py        ssh: commands, files there and back
flow.py       the launch itself, from the offer to the fetched report
commands.py   the command line
"""
