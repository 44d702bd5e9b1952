"""Attribution: which parts of an input a model's output rests on.

The package is not called ``explain``: importing a submodule of ``gradscope.explain`` would set that
name on the root package and hide the public function ``gradscope.explain``.
"""
