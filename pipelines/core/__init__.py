"""Settings and input errors enter; a run directory with its records leaves. Nothing here knows a model or a data set."""
