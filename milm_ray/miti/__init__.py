"""The MITI study: coding scheme, coding sheets, summary scores, agreement, AnnoMI."""
