"""`python -m bench paper`: the paper's tables for a model and its memorized prompts, against the published peers.

inputs     what is generated: prompts, training images, settings; everything bad is refused here, before any work
store      results.jsonl and the images: resumable after a SIGKILL at any point
work       the units of work and the loop over them
measures   what is measured on each image, by which network
detection, curve, summary    the numbers
plots, tables, report        what is shown
"""
