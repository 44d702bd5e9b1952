"""Attribution: which parts of an input a model's output rests on. One module for each family."""
