"""PAB as host data, without torch: configs, schedules, reuses, plans, what they cost, presets, file formats,
pictures."""
