"""PAB itself: rules, plan, slots, residual stream, generations and contexts."""
