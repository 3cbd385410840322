"""What ran: parameters, provenance, claims and verdicts, files."""
