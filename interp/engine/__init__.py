"""The engine: schedules, traces, backends and the one loop over patches."""
