"""Every number of a page, computed again from the rows, by a script that shares no code with the page.

    python -m bench.recheck OUT          # a folder of `python -m bench paper` or `scenario`

Reads results.jsonl (or results.jsonl.gz), seconds.json and settings.json, works out every table of tables.md by itself (numpy and scipy
alone) and every number of its sentences, and compares them as text. Exits with 1 and what differs. FID and the published numbers are not
from the rows.
"""
