"""dcext inside other libraries."""
