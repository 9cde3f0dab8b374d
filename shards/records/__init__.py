"""How files of others are read: opened safely, within limits, each kind of record by one reader that checks it."""
