"""PAB as host data, without torch: configs, schedules, reuses, plans and their cost, presets, formats, pictures."""
