"""The front door: `funmatch WORD ...`, thin over the rooms' own mains, and what checks a machine before a run.

main.py      which word means which room
words.py     the words: what each does, with an example
ranks.py     several processes of one training run
completion.py  what TAB offers
doctor.py    `funmatch doctor`: asks all checks, prints findings
finding.py   what a check finds
machine.py   checks of this machine: Python, packages, CUDA, DALI, GPUs, ports, shared memory, disk
sources.py   checks of what a run reads and keeps: data sets, the store, the run's folder
replicas.py  checks of teachers

views_sheet.py, views_seen.py, views_page.py   `funmatch views`: its command, what both sides saw, how it is drawn
export.py, timm_folder.py, onnx_file.py, model_card.py   `funmatch export`: its command, and what it leaves
"""
