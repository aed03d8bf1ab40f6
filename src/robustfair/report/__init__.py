"""Audits for people: console tables, figures, and one offline HTML page."""
