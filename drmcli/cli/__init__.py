"""The command line: options in, recipes called, results drawn. Typer and Rich are seen only here."""
