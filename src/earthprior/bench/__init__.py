"""How few labels are enough: the same question to several methods, at several budgets of labelled chips."""
