"""Small backups that answer while a served model is late, and which of their answers to release."""
