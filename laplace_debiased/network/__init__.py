"""Calling a user's model, and leaving it as it was.

What goes in and comes out:

* ``inputs``: tensors, several, or a mapping; cutting, moving and handing them over.
* ``outputs``: what a network must return, and what its weights must be.
* ``memory``: telling a lack of memory from a failure of the model.

The network as a function of its parameters:

* ``grad_modes``: leaving inference mode.
* ``function_modes``: modes that are idle outside of their block.
* ``substitution``: a model run with other weights, without a write to its own.
* ``functional``: its outputs as a function of the covered parameters.
* ``transforms``: derivatives of such a function, per sample and along directions.

What the user has stays as it is:

* ``interrupts``: guards that no Ctrl-C cuts in two.
* ``modes``: evaluation mode, attention kernels, compiled code; ``undisturbed`` is the whole of it.
* ``precision``: float32 or better, without automatic casts.
* ``rng``: random generators.
* ``locks``: one thread at a time where a model differs meanwhile.
* ``identity``, ``watch``: which model a posterior was fitted to, and whether it still is that one.
"""
