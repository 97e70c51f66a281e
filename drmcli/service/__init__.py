"""What speaks HTTP: a queue that joins requests into batches, the scorer's interface, the page where people vote."""
