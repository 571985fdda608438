"""What the commands share: settings in words, results files, tables in Markdown, progress bars."""
