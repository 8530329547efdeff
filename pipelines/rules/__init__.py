"""Filter rules, one file a family: row -> row or Drop."""
