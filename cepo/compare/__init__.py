"""Methods x tasks x seeds under one budget, and an honest table: `cepo compare PLAN.yaml`.

plan.py         what a plan says, checked, and the cells it asks for
cells.py        one cell: a normal run, and the small JSON of its numbers
statistics.py   paired intervals and Holm's correction
results.py      all cells into results.json, with the checks that the comparison was fair
table.py        results.json as Markdown and as a picture
command.py      the command
"""
