"""The one reader of each container: zip archives, strict JSON, pickles as data, .npy files, CRCs.

What strangers made is read here and nowhere else, so that no two parts of the program can disagree
about what a file holds. Nothing here knows tensors, models or histories.
"""
