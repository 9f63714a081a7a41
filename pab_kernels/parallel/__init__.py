"""One model on several ranks: parts of the sequence and branches of guidance, with nothing sent where PAB reuses."""
