"""Tables from results: wide markdown, paired comparisons, HACK's ablations, the order of methods against print.

Every module reads files that `heatkv eval` wrote and hands back a pandas table or markdown; no model, no method and no
metric runs here. `variants` names a run and its point, `compare` pairs runs image by image, `tables` writes markdown;
`hack` and `published` put figures of papers beside ours.
"""
