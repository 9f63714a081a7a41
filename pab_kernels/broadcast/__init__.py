"""PAB at run time: requests, generations, calls and their turns, contexts, slots, residual stream."""
