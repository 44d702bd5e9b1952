"""The methods themselves: a module for each family, named by the rows of ``attribution.methods``.

``relevance``, ``propagation``, ``sharing`` and ``operators`` are what the methods over a recorded
pass (LRP, AttnLRP, DeepLIFT) are made of; ``references`` and ``blur`` are shared by several.
"""
