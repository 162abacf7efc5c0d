"""A data set and a model enter; all that one job needs and another does not leaves. One file a task."""
