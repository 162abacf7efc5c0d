"""A teacher and a budget enter, the model that meets the budget leaves."""
